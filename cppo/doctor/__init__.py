"""The conformance kit behind `cppo doctor`: is everything right on this machine's hardware?

`command.py` starts one or several processes (`worker.py`), each of which goes through the sections
in `SECTIONS`; a section is a file here, and yields one finding for each thing it measured. A worker
that dies loses only the section it was in.
"""
