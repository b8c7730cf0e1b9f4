"""The record of a window's passes, the state that its second pass restores, and the checks of both."""
