"""A page in the browser that shows the jobs of this user and commands them, from a server of its own.

Jobs are reached as every client reaches them; browsers never reach a job. The page is one file without anything from
outside, and what runs say of themselves is only ever text in it.
"""
