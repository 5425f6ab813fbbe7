"""What everything else stands on: errors, seeds, devices, checkpoints, logs and progress bars."""
