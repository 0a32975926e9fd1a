"""Does a saved checkpoint keep its promise."""
