"""Files that are whole or absent: written, locked, sealed, cached."""
