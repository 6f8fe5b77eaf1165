"""What people look at afterwards: the commands `aflora show`, `collect` and `trace`, and `report.print_summary`.

Reads runs' directories; imports no torch, and matplotlib only to draw.
"""
