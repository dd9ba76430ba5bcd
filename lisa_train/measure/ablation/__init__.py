"""What every layer's change was worth: losses with one unit's change taken out, or put in alone."""
