"""The control tokens of the model families, by their published tokenizers and chat templates, and a made tokenizer that reads
them all."""

FAMILIES = {
    "ChatML, Qwen": "<|im_start|> <|im_end|> <|im_sep|> <|endoftext|> <think> </think> <tool_call> </tool_call> <tool_response> "
                    "<|object_ref_start|> <|vision_pad|> <|fim_pad|> <|repo_name|> <tts_text_bos> <|extra_0|>",
    "SmolLM2, StarCoder": "<repo_name> <reponame> <file_sep> <filename> <gh_stars> <issue_start> <issue_comment> <issue_closed> "
                          "<jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> <jupyter_script> <empty_output> <fim_prefix> "
                          "<fim_middle> <fim_suffix> <fim_pad> <fim-prefix> <commit_before> <intermediate_to_code> <pr_status> <pr>",
    "Llama 1 and 2": "<s> </s> <unk> [INST] [/INST] <<SYS>> <</SYS>> <pad> [PAD]",
    "Code Llama": "\u2581<PRE> \u2581<MID> \u2581<SUF> \u2581<EOT>",
    "Llama 3 and 4": "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|> <|finetune_right_pad_id|> "
                     "<|reserved_special_token_0|> <|header_start|> <|eot|> <|text_post_train_reserved_special_token_0|>",
    "Mistral": "[TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] "
               "[TOOL_CONTENT] [IMG] [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [ARGS] [CALL_ID] [THINK] [/THINK] [REF] [/REF] "
               "[REFERENCE_DOC_0] [BEGIN_AUDIO] [TRANSCRIBE] [MODEL_SETTINGS] [control_8] <SPECIAL_20>",
    "Gemma": "<bos> <eos> <mask> <start_of_turn> <end_of_turn> <unused0> <start_of_image> [@BOS@] <|turn> <turn|> <|channel> <channel|> "
             "<|tool_response> <tool_response|> <|\"|>",
    "Phi": "<|user|> <|assistant|> <|system|> <|end|> <|placeholder1|>",
    "DeepSeek": "<\uff5cbegin\u2581of\u2581sentence\uff5c> <\uff5cend\u2581of\u2581sentence\uff5c> <\uff5c\u2581pad\u2581\uff5c> <\uff5cUser\uff5c> <\uff5cAssistant\uff5c> "
                "<\uff5cfim\u2581hole\uff5c> <\uff5ctool\u2581calls\u2581begin\uff5c> <\uff5c/table>\uff5c <|EOT|> \uff5cDSML\uff5c <dsml: </dsml:",
    "gpt-oss, GPT-4": "<|channel|> <|message|> <|start|> <|return|> <|call|> <|constrain|> <|startoftext|> <|endofprompt|>",
    "Cohere": "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|CHATBOT_TOKEN|> <|START_THINKING|> <BOS_TOKEN> <EOP_TOKEN> <PAD>",
    "GLM": "[gMASK] [sMASK] [MASK] <sop> <eop> <|observation|> <arg_key> </arg_value> <|begin_of_image|>",
    "Falcon": ">>TITLE<< >>ABSTRACT<< >>INTRODUCTION<< >>SUMMARY<< >>QUESTION<< >>ANSWER<< >>UNUSED_0<<",
    "EXAONE": "[|system|] [|user|] [|assistant|] [|endofturn|] [BOS] [UNK]",
    "Seed": "<seed:bos> <seed:eos> <seed:think> </seed:think> <seed:tool_call> <[fim-suffix]> <[PAD\u2581TOKEN]>",
    "MiniMax": "]~!b[ ]~b] [e~[ ]!p~[ ]<]image[>[ ]<]minimax[>[ <minimax:tool_call> <mm:think>",
    "ERNIE": "<mask:1> <cls> <sep> <|LOC_0|> <|IMAGE_PLACEHOLDER|>",
    "InternLM, MiniCPM, TeleChat": "[UNUSED_TOKEN_146] <eoh> <eoa> <|action_start|> <\u7528\u6237> <AI> <_user> <_bot> <_end>",
    "Kimi, Ling, LongCat, Granite": "<|im_middle|> <|tool_calls_section_begin|> [start_header_id] [EOS] <role> <|role_end|> <longcat_think> "
                                    "</longcat_think> <|start_of_role|> <think_on>",
    "BERT, T5, BLOOM, OLMo": "[CLS] [SEP] <extra_id_0> <2en> <reserved_106> |||EMAIL_ADDRESS||| |||IP_ADDRESS||| <|padding|> <image> <video>"}
MARKS = sorted({mark for marks in FAMILIES.values() for mark in marks.split()})


def marked_tokenizer():
    """The tests' byte tokenizer with every mark as a token: every other one is special, the rest merely added."""
    from conftest import byte_tokenizer
    from tokenizers import AddedToken

    tokenizer = byte_tokenizer()
    for special in (True, False):
        tokenizer.add_tokens([AddedToken(m, special=special, normalized=False) for m in MARKS[not special::2]], special_tokens=special)
    return tokenizer


def added_ids(tokenizer, text: str) -> list[int]:
    """The ids of added tokens, special or not, in a text."""
    added = set(tokenizer.added_tokens_decoder)
    return [i for i in tokenizer(text, add_special_tokens=False).input_ids if i in added]
