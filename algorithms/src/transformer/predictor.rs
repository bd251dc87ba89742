//! A trained language model that goes on from prompts.

use std::ops::ControlFlow;
use std::sync::Arc;

use burn::tensor::Device;

use crate::algorithm::{
    GenerateInput, ModelDescriptor, Predictor, Request, RequestError, Response,
};
use crate::error::AlgorithmError;
use crate::transformer::decoder::Decoder;
use crate::transformer::sampling::next_token;
use crate::transformer::settings::{self, Parameters};
use crate::transformer::tokenizer::TextTokenizer;
use crate::weights::load_weights;

/// Longest prompt: only the last window of it is read, and tokenising must stay a matter of
/// milliseconds.
const PROMPT_BYTES_MAX: usize = 256 << 10;
/// Most tokens of one answer: a request holds the model while it runs.
const MAX_TOKENS_MAX: u32 = 8192;
/// Above it all tokens are equally likely to three digits.
const TEMPERATURE_MAX: f32 = 100.0;

/// A language model ready to answer.
pub(super) struct TextPredictor {
    decoder: Decoder,
    /// Shared, so that a stream of text can borrow it while the decoder moves on.
    tokenizer: Arc<TextTokenizer>,
    /// Tokens with an embedding: more than the tokenizer's if the vocabulary was padded.
    known: usize,
}

impl TextPredictor {
    pub(super) fn load(
        descriptor: &ModelDescriptor,
        weights: &[u8],
        device: &Device,
    ) -> Result<Self, AlgorithmError> {
        let (parameters, tokenizer) = Parameters::read(descriptor)?;
        let architecture = parameters.architecture;
        let params = load_weights(&architecture.model(0.0), weights, device)?;
        let known = tokenizer.vocabulary();
        let decoder = Decoder::new(architecture, params, device);
        Ok(Self { decoder, tokenizer: Arc::new(tokenizer), known })
    }

    fn check_input(&self, input: &GenerateInput) -> Result<(), RequestError> {
        let refuse = |message: String| Err(RequestError(message));
        if input.prompt.is_empty() {
            return refuse("`prompt` is empty, expected some text to go on from".into());
        }
        if input.prompt.len() > PROMPT_BYTES_MAX {
            let found = input.prompt.len();
            return refuse(format!(
                "`prompt` has {found} bytes, expected at most {PROMPT_BYTES_MAX}"
            ));
        }
        if input.max_tokens == 0 || input.max_tokens > MAX_TOKENS_MAX {
            let found = input.max_tokens;
            return refuse(format!("`max_tokens` is {found}, expected 1 to {MAX_TOKENS_MAX}"));
        }
        if !(0.0..=TEMPERATURE_MAX).contains(&input.temperature) {
            let found = input.temperature;
            return refuse(format!("`temperature` is {found}, expected 0 to {TEMPERATURE_MAX}"));
        }
        if input.top_k == Some(0) {
            return refuse("`top_k` is 0, expected at least 1, or leave it out".into());
        }
        Ok(())
    }

    /// Logits after appending `token`. A full window is halved first: positions are absolute, so
    /// moving it by one token would mean reading it all again for every token.
    fn advance(&mut self, context: &mut Vec<u32>, token: u32) -> Vec<f32> {
        context.push(token);
        if self.decoder.room() > 0 {
            return self.decoder.read(&[token]);
        }
        let kept = (self.decoder.window() / 2).max(1);
        context.drain(..context.len() - kept);
        self.decoder.clear();
        self.decoder.read(context)
    }
}

impl Predictor for TextPredictor {
    fn predict(&mut self, requests: Vec<Request>) -> Vec<Result<Response, RequestError>> {
        let mut answer = |request: Request| {
            self.check(&request)?;
            match request {
                Request::Generate(input) => {
                    self.generate(&input, &mut |_| ControlFlow::Continue(()))
                }
                Request::Image(_) => Err(wrong_kind()),
            }
        };
        requests.into_iter().map(&mut answer).collect()
    }

    fn generate(
        &mut self,
        input: &GenerateInput,
        emit: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Response, RequestError> {
        self.check_input(input)?;
        let mut context = self.tokenizer.encode(&input.prompt).map_err(RequestError)?;
        if context.is_empty() {
            return Err(RequestError("`prompt` has no tokens: give it some text".into()));
        }
        let window = self.decoder.window();
        context.drain(..context.len().saturating_sub(window));
        self.decoder.clear();
        let mut logits = self.decoder.read(&context);
        let tokenizer = Arc::clone(&self.tokenizer);
        let (mut stream, mut text) = (tokenizer.stream(), String::new());
        let (mut tokens, mut stopped) = (0, false);
        while tokens < input.max_tokens && !stopped {
            if !logits.iter().all(|logit| logit.is_finite()) {
                return Err(RequestError("the model's arithmetic overflows on this text".into()));
            }
            let token = next_token(&logits[..self.known], input, u64::from(tokens));
            tokens += 1;
            let piece = stream.push(token);
            text.push_str(&piece);
            stopped = !piece.is_empty() && emit(&piece).is_break();
            if tokens < input.max_tokens && !stopped {
                logits = self.advance(&mut context, token);
            }
        }
        let rest = stream.finish();
        if !rest.is_empty() && !stopped {
            text.push_str(&rest);
            stopped = emit(&rest).is_break();
        }
        let finish_reason = if stopped { "stopped" } else { "length" }.to_owned();
        Ok(Response::Text { text, tokens, finish_reason })
    }

    fn request_types(&self) -> Vec<String> {
        settings::schema().request_types
    }

    fn check(&self, request: &Request) -> Result<(), RequestError> {
        match request {
            Request::Generate(input) => self.check_input(input),
            Request::Image(_) => Err(wrong_kind()),
        }
    }
}

fn wrong_kind() -> RequestError {
    RequestError("this model goes on from text, found an image: send a `prompt`".into())
}
