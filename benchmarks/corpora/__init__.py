"""Text of several domains from pinned packages."""
