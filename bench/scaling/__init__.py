"""What several processes are worth: measured here, and on paper for nodes of GPUs."""
