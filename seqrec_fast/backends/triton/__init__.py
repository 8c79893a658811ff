"""Triton implementations. Imported only when one is asked for: importing Triton costs more than importing this package."""
