"""Threads in step: one that stays inside a context, and turns at what is for a whole model."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def inside(context):
    """Enter a context in a thread, and yield what calls a function there."""
    with ThreadPoolExecutor(1) as pool:

        def call(function, *arguments):
            return pool.submit(function, *arguments).result(timeout=30)

        call(context.__enter__)
        try:
            yield call
        finally:
            call(context.__exit__, None, None, None)


class Turns:
    """Many threads in `shared` blocks, or one in an `alone` block, which those that come later await."""

    def __init__(self):
        self._condition = threading.Condition()
        self._sharing = self._waiting = 0

    @contextmanager
    def shared(self):
        with self._condition:
            self._condition.wait_for(lambda: not self._waiting)
            self._sharing += 1
        try:
            yield
        finally:
            with self._condition:
                self._sharing -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self):
        with self._condition:
            self._waiting += 1
            try:
                self._condition.wait_for(lambda: not self._sharing)
                yield
            finally:
                self._waiting -= 1
                self._condition.notify_all()
