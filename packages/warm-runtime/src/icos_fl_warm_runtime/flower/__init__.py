"""All that is known of Flower's inside, and where it is touched.

Nothing of Flower is changed on disk. Names of its modules are given other values in this process;
``names`` holds what those replacements rely on, with a digest of its source, and tells what is no
longer as it was. Then the stock path is taken.
"""
