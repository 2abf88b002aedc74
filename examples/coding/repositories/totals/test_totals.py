import unittest

from totals import total


class TotalTest(unittest.TestCase):
    def test_all_numbers_count(self):
        self.assertEqual(total([1, 2, 3]), 6)

    def test_nothing_is_zero(self):
        self.assertEqual(total([]), 0)
