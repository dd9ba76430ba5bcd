"""What is measured of every tensor, merged over processes and buffered; `disk` writes it."""
