"""MRConv beside its peers."""
