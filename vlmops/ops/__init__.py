"""The ops. ``__all__`` is the one list of them: one name, one stem, everywhere in the tree."""

__all__ = ["mrope"]
