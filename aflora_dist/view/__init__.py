"""What people look at afterwards. Reads runs' directories; needs neither torch nor a GPU."""
