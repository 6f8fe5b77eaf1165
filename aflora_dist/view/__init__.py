"""What people look at afterwards. Reads runs' directories; imports no torch, and matplotlib only to draw."""
