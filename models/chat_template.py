"""Read the chat template that a run file gives for a model."""

from models.config import ModelError
from models.locate import find_path


def read_chat_template(given: str) -> str:
    """Return the text of a chat template that is given as a file or as the text.

    Raises:
        ModelError: there is no such file, or it holds no text.
    """
    if "{" in given:
        return given
    file = find_path(given)
    if file is None or not file.is_file():
        raise ModelError(f"chat_template {given}: there is no such file, and it is no Jinja template itself")
    content = file.read_bytes()
    remedy = "give a file with a Jinja template"
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"chat_template {given}: is not UTF-8 text ({error.reason}); {remedy}") from None
    if not text.strip() or "\0" in text:
        what = "has a NUL byte, which no text has" if text.strip() else "is empty"
        raise ModelError(f"chat_template {given}: {what}; {remedy}")
    return text
