"""What a step of each training is."""
