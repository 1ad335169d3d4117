"""What a step would take on devices that are not there: compiled for them ahead of time, weighed, never run."""
