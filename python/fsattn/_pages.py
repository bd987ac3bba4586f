"""Which pages belong to which sequence: reference counts on the host, no tensors."""

from __future__ import annotations


class CacheFullError(RuntimeError):
    """No free page is left; the cache is as it was before the call."""


class PagePool:
    """Page ids 0 .. num_pages - 1, each free or held by one or more sequences."""

    def __init__(self, num_pages: int):
        self._free = list(range(num_pages - 1, -1, -1))  # the last one is handed out first
        self._holders = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def share(self, pages: list[int]) -> None:
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: list[int]) -> None:
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)

    def is_shared(self, page: int) -> bool:
        return self._holders[page] > 1


class PageList:
    """The pages of one sequence in one pool, in the order of its tokens."""

    def __init__(self, pool: PagePool, page_size: int, pages: list[int] | None = None):
        self._pool, self._page_size = pool, page_size
        self.pages: list[int] = [] if pages is None else pages

    def _open_page(self, length: int) -> int | None:
        """Index of the page that token `length` goes to, if it exists and has to be copied."""
        page = length // self._page_size
        if length % self._page_size and self._pool.is_shared(self.pages[page]):
            return page
        return None

    def pages_wanted(self, length: int, new_length: int) -> int:
        """Free pages that grow() would take."""
        if new_length == length:
            return 0
        missing = -(-new_length // self._page_size) - len(self.pages)
        return max(missing, 0) + (self._open_page(length) is not None)

    def grow(self, length: int, new_length: int) -> tuple[int, int] | None:
        """Makes room for tokens length .. new_length - 1 in pages that nobody shares.

        Returns (old, new) when a page has to be copied first.
        """
        if new_length == length:
            return None
        copied = None
        page = self._open_page(length)
        if page is not None:
            copied = self.pages[page], self._pool.take()
            self._pool.release([copied[0]])
            self.pages[page] = copied[1]
        while len(self.pages) * self._page_size < new_length:
            self.pages.append(self._pool.take())
        return copied

    def shrink(self, length: int) -> None:
        """Gives back the pages behind the first `length` tokens."""
        keep = -(-length // self._page_size)
        self._pool.release(self.pages[keep:])
        del self.pages[keep:]

    def fork(self, length: int) -> PageList:
        """A list that shares the pages of the first `length` tokens."""
        pages = self.pages[: -(-length // self._page_size)]
        self._pool.share(pages)
        return PageList(self._pool, self._page_size, pages)
