"""Pages that show what a run did: one HTML file that needs nothing else."""
