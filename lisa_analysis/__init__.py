"""Layer importance from run directories: profiles, verdicts, probabilities, reports."""
