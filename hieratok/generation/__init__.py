"""From a trained generator to images: schedulers, the pipeline, and sets of samples."""
