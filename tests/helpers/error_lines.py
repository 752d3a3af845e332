"""What a command says that refuses its arguments."""


def assert_refused(capsys, message):
    """That nothing is on standard output, and one line with the message on standard error, which begins with error."""
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert told.err.startswith("error: ")
    assert message in told.err
