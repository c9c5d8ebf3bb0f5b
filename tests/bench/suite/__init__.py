"""The benchmark suite: nbd-img beside its peers. Nothing but Python's standard library.

client   a small NBD client            loads     what is run against a server, and its figures
images   the disks that are served     rows      which loads on which servers
servers  starting, ending, /proc       bars      what the figures have to reach
results  figures kept between runs     table, chart   how they are shown
"""
