import unittest

from slug import slug


class SlugTest(unittest.TestCase):
    def test_words_are_joined(self):
        self.assertEqual(slug("a  good day"), "a-good-day")

    def test_letters_are_small(self):
        self.assertEqual(slug("A Good Day"), "a-good-day")
