"""Files of ``torch.save``: zip archives, the older pickles, and the first tar files."""
