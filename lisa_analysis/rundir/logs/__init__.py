"""Logs of runs that were trained without this toolkit: what they hold of loss, rate and norm."""
