"""Data: sources of rows, the bundled reviews, and the DataModule that splits and batches them."""

from grade_lightning.data.batches import LabelledBatch as LabelledBatch
from grade_lightning.data.batches import PairBatch as PairBatch
from grade_lightning.data.batches import PreferenceBatch as PreferenceBatch
from grade_lightning.data.batches import PromptBatch as PromptBatch
from grade_lightning.data.batches import TextBatch as TextBatch
from grade_lightning.data.batches import UnpairedBatch as UnpairedBatch
from grade_lightning.data.datamodule import TextDataModule as TextDataModule
from grade_lightning.data.products import BundledProducts as BundledProducts
from grade_lightning.data.products import generate_products as generate_products
from grade_lightning.data.reviews import generate_reviews as generate_reviews
from grade_lightning.data.reviews import grammar_positive as grammar_positive
from grade_lightning.data.reviews import grammar_valid as grammar_valid
from grade_lightning.data.reviews import judge_sentences as judge_sentences
from grade_lightning.data.sources import BundledReviews as BundledReviews
from grade_lightning.data.sources import BundledSums as BundledSums
from grade_lightning.data.sources import HubDataset as HubDataset
from grade_lightning.data.sources import InMemory as InMemory
from grade_lightning.data.sources import LocalFiles as LocalFiles
from grade_lightning.data.sources import Source as Source
from grade_lightning.data.sums import generate_sums as generate_sums
from grade_lightning.data.texts import opening as opening
