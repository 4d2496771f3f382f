"""Records to tokens with exact completion masks, from the tokenizer's own chat template.

messages -> `chat_template` (writes them, in a bounded `template_process`) -> `turn_spans` (where each assistant turn
stands in the text) -> `fit_length` (tokens, cut at the turns; oldest turns dropped) -> `omissions` (is the text of each
trained turn in its tokens?) -> rows: `conversation_rows`, `answer_rows` and `render_view`, which has documents too.
"""
