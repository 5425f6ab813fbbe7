"""LeRobotDataset folders: v2.1 and v3.0 read, v3.0 written."""
