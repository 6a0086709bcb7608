"""A pod of Cloud TPUs and the run on it, by the cloud's own command."""
