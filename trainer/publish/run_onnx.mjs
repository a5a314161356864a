// Caption images with transformers.js alone, in Node or in a page:
//     npm install @huggingface/transformers
//     node caption.mjs [--int8] [--text STYLE_OR_QUESTION] IMAGE...
// This file lies beside the exported captioner, in the folder that holds onnx/.

import { AutoImageProcessor, AutoModelForVision2Seq, AutoTokenizer, RawImage, env } from '@huggingface/transformers';

/**
 * Load a captioner: a folder of files in Node, or a name below `env.remoteHost` or `env.localModelPath` in a page.
 * `int8` takes the parts with weights of 8 bits, if they were exported.
 */
export async function loadCaptioner(model, { int8 = false, ...options } = {}) {
    const [processor, tokenizer, captioner] = await Promise.all([
        AutoImageProcessor.from_pretrained(model, options),
        AutoTokenizer.from_pretrained(model, options),
        AutoModelForVision2Seq.from_pretrained(model, { dtype: int8 ? 'q8' : 'fp32', ...options }),
    ]);

    /** Return a caption of each image (what RawImage.read takes), of the usual style or that of a name; of a question, its answer. */
    async function caption(images, text = '') {
        const written = await tokens(images, text);
        return written.map((ids) => tokenizer.decode(ids, { skip_special_tokens: true }).trim());
    }

    /** Return the likeliest tokens of each image, one after the other. */
    async function tokens(images, text = '') {
        const prompt = promptOf(captioner.config, tokenizer, text);
        const read = await Promise.all(images.map(readImage));
        const { pixel_values } = await processor(read);
        const { max_caption_tokens: most, text_positions: positions } = captioner.config;
        if (positions != null && prompt.length >= positions) {
            throw new Error(`the prompt has ${prompt.length} tokens, and behind an image there is room for ${positions}`);
        }
        const limit = { max_new_tokens: positions == null ? most : Math.min(most, positions - prompt.length) };
        const prompts = images.map(() => prompt);
        const sequences = await captioner.generate({ inputs: pixel_values, decoder_input_ids: prompts, ...limit });
        return sequences.tolist().map((ids) => textOf(ids.slice(prompt.length).map(Number), captioner.config.eos_id));
    }

    return { caption, tokens };
}

/** Return an image upright, in RGB over white, as in training. A page turns it itself; Node does not for an address of the web. */
async function readImage(image) {
    if (globalThis.process?.versions?.node && typeof image === 'string' && !/^(https?|data|blob):/.test(image)) {
        const { default: sharp } = await import('sharp'); // which transformers.js brings along
        const upright = sharp(image).rotate().flatten({ background: 'white' }).toColourspace('srgb');
        const { data, info } = await upright.raw().toBuffer({ resolveWithObject: true });
        return new RawImage(new Uint8ClampedArray(data), info.width, info.height, info.channels).rgb();
    }
    const { data, width, height } = (await RawImage.read(image)).rgba();
    const onWhite = data.map((level, at) => (at % 4 === 3 ? 255 : 255 + ((level - 255) * data[at | 3]) / 255));
    return new RawImage(onWhite, width, height, 4).rgb();
}

/** Return the tokens before the first end of a text: a row that has ended is written on while others have not. */
function textOf(ids, eos) {
    return ids.includes(eos) ? ids.slice(0, ids.indexOf(eos)) : ids;
}

const STYLES = ['plain', 'detailed', 'brief', 'alt', 'tags', 'ocr', 'human']; // usual ones, whose names are no questions

/** Return the token ids of a prompt. Throws for a question to a captioner that answers none. */
function promptOf({ prompts, kind, usual_style: usual }, tokenizer, text) {
    const styles = [...new Set(prompts.map(([, style]) => style).filter(Boolean))];
    if (STYLES.includes(text) && !styles.includes(text)) {
        throw new Error(`this captioner knows no style ${text}; it was trained on ${styles.join(', ') || 'answers alone'}`);
    }
    const question = text && !styles.includes(text) ? text : '';
    const style = question ? '' : text || usual;
    const sources = prompts.filter(([, learned]) => learned === style).map(([source]) => source);
    if (!style && !question) {
        throw new Error('this captioner has learned answers alone: ask it a question');
    }
    if (!sources.length) {
        throw new Error(`this captioner answers no questions; it knows the styles ${styles.join(', ')}`);
    }
    const source = sources.includes('human') ? 'human' : sources[0];
    const ids = (words) => Array.from(tokenizer.encode(words, { add_special_tokens: false }), Number);
    const special = question && ids(question).find((id) => tokenizer.decode([id]) && !tokenizer.decode([id], { skip_special_tokens: true }));
    if (special != null && special !== '') {
        throw new Error(`the question holds ${tokenizer.decode([special])}, which is a token of its own here`);
    }
    if (kind === 'pretrained') {
        return ids(question ? ` Question: ${question} Answer:` : ` A ${style} caption (${source}):`);
    }
    return question ? [...ids(`<${source}>`), ...ids(question), ...ids('<answer>')] : [...ids(`<${source}>`), ...ids(`<${style}>`)];
}

if (globalThis.process?.argv?.[1]?.endsWith('caption.mjs')) {
    const { parseArgs } = await import('node:util');
    const { dirname } = await import('node:path');
    const { fileURLToPath } = await import('node:url');
    const known = { text: { type: 'string', default: '' }, int8: { type: 'boolean', default: false } };
    const { values, positionals } = parseArgs({ options: known, allowPositionals: true });
    env.allowRemoteModels = false;
    const captioner = await loadCaptioner(dirname(fileURLToPath(import.meta.url)), { int8: values.int8 });
    for (const image of positionals) {
        try {
            console.log(`${image}: ${(await captioner.caption([image], values.text))[0]}`);
        } catch (error) {
            console.error(`${image} cannot be captioned: ${error.message}`);
            process.exitCode = 1;
        }
    }
}
