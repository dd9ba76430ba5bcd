"""What people look at: plots, the report, the terminal, JSON, and the command."""
