"""The Ray session under a job, its autoscaler, and signals."""
