"""The files of a run to its figures and its page, and the committed copy of them."""
