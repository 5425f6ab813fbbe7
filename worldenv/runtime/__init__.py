"""What every floor of the house stands on: errors, seeds, devices, checkpoints, logs and progress bars."""
