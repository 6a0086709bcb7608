"""What a run reads: sources, tasks, tokenizers, the cache, and batches by random access."""

from data.arrow import Parquet, SavedDataset
from data.cache import Cache
from data.chats import ChatLines, ChatTemplate
from data.control import ControlEntry
from data.corpora import PythonCode, PythonDocs, PythonSearch
from data.derived import PythonChats, PythonLists, PythonPreferences, PythonPrompts, PythonSummaries
from data.described import Described
from data.example_rows import text_batch
from data.mixing import Mixture, MixtureReader
from data.prefetch import Prefetch
from data.reader import Cached, Reader, Records
from data.retrieval import JudgedPairs, Retrieval, python_search
from data.saved_tokenizers import Saved, load_tokenizer
from data.sources import InMemory, JsonLines, LocalText, Portion
from data.tasks import TASKS, Task, chat_task, prepare, text_task
from data.tensorflow_sources import SeqioTask, Tfds
from data.tokenizer_json import TokenizerJson
from data.tokenizers import Bytes, SentencePiece, Specials, Tokenizer

__all__ = [
    "TASKS",
    "Bytes",
    "Cache",
    "Cached",
    "ChatLines",
    "ChatTemplate",
    "ControlEntry",
    "Described",
    "InMemory",
    "JsonLines",
    "JudgedPairs",
    "LocalText",
    "Mixture",
    "MixtureReader",
    "Parquet",
    "Portion",
    "Prefetch",
    "PythonChats",
    "PythonCode",
    "PythonDocs",
    "PythonLists",
    "PythonPreferences",
    "PythonPrompts",
    "PythonSearch",
    "PythonSummaries",
    "Reader",
    "Records",
    "Retrieval",
    "Saved",
    "SavedDataset",
    "SentencePiece",
    "SeqioTask",
    "Specials",
    "Task",
    "Tfds",
    "Tokenizer",
    "TokenizerJson",
    "chat_task",
    "load_tokenizer",
    "prepare",
    "python_search",
    "text_batch",
    "text_task",
]
