"""What every training shares: settings, schedule, EMA, checkpoints, guards, logs, pictures, the run's folder."""
