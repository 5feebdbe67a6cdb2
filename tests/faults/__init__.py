"""Faults planted into the code one at a time, to see whether the tests find them.

``make test-faults`` runs it. Each fault is what somebody who edits this code may get wrong: a small
search and replacement (``planted.py``, ``promised.py``) in a copy of the checkout
(``checkout.py``). It meets the tests of its folder first, then the quick ones, then all, until one
of them fails (``trial.py``); what is known is kept (``records.py``), so that a second call goes on
where the first ended.
"""
