"""Engines that step one network on one or many processes, and the sharded EMA."""
