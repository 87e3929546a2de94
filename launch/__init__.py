"""The command line and the cluster."""
