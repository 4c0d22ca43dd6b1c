"""Readers, one file a layout. A layout is a module with `LOOKS_FOR` (what its folders hold, in words), `holds(folder)
-> bool` and `read(folder) -> Content`; `dhns_fast.data.load` lists them. Files of features are read by `features`,
whatever the layout.
"""
