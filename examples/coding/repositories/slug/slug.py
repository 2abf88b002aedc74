def slug(title):
    """A title as it stands in an address."""
    return "-".join(title.split())
