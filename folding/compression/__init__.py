"""Parameters become fewer."""
