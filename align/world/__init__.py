"""A small world whose facts the program knows: a support desk that answers in English and Chinese.

Because the facts are known, a program can judge a completion, so a whole alignment pipeline can be measured
without a download: `write.write_world` writes the data sets, `judge.judge` scores what a model says.
"""
