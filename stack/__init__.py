"""Library of the text-to-image training stack: no argument parsing, no cluster."""
