"""Everything that needs a GPU, in one call: ``bench/gpu_check.sh``.

``__main__`` is the command line, ``steps`` the list of what is done, ``runner`` does it: each step
in processes of its own, since an illegal access ends every later call of the process that made it.
``folder`` keeps what was found on disk at any time; ``summary`` makes a page of it. The programs of
single steps are ``facts``, ``build`` and ``smoke``; others are those of ``bench`` and the tests.

The runner imports nothing but the standard library.
"""
