//! How messages become bytes: tonic's and prost's own way, with smaller buffers to begin with.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// What a stream's buffer holds at first, in bytes, each way. It grows with its messages. tonic's 8 KiB are a quarter of what a host that only
/// beats costs its coordinator.
const BUFFER: usize = 512;
/// What is encoded is handed on from so many bytes: tonic's own figure.
const HANDED_ON: usize = 32 * 1024;

/// The codec of all our services, named by the generated code.
#[derive(Debug, Clone)]
pub(crate) struct Sparing<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for Sparing<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for Sparing<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(BufferSettings::new(BUFFER, HANDED_ON))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(BufferSettings::new(BUFFER, HANDED_ON))
    }
}
