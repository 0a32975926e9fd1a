"""Text of any kind into documents, splits and blocks of tokens."""
